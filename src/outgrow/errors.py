"""The one error a user can cause and a user can mend."""


class OutgrowError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it and the way out."""
