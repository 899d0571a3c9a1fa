"""A recipe on the meta device: are its parts right, and what will they take?"""
