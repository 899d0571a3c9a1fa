"""What the tests share: small models and films, one measure of closeness, runs and ranks."""
