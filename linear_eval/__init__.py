"""What frozen features are worth to a linear classifier. Knows exports only, never how they were trained."""
