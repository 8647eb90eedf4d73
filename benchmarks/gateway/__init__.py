"""What stands between a caller and the provider, each in its turn in front of one and the same provider."""
