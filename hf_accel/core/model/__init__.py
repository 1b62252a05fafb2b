"""What a model is: its parts, its configs, what moves it and what its results depend on."""
