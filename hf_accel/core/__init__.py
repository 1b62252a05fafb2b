"""The only machinery: what a step is (config, patcher), how it is undone (journal), where it lands (anatomy)."""
