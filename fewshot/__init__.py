"""What frozen features are worth where a class has few labelled images. Knows exports only, never their training."""
