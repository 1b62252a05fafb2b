"""Describes decoder layers by what they do when they run, not by their names.

A copy of the model that shares its tensors reads a few tokens. What every module inside a layer was given and returned
is kept, and what its attention was called with; then the layer is put together again from these parts: which products
read the same input, where the heads lie in what they give, how they are turned, what joins the residual. A part that
nothing explains leaves the layer as it is. What is found is a proposal: whoever replaces a layer compares its own
forward with the replacement.
"""
