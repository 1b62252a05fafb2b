"""Where blocks of keys and values lie: on the device, in main memory, on disk."""
