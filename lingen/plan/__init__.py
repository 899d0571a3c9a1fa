"""A recipe on the meta device: whether its parts are right, and what they will take."""
