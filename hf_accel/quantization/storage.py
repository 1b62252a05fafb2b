"""How a model with packed weights is saved. (placeholder)"""


class Seal:
    """x"""

    is_compileable = False
