"""Networks that are not timm's, and how networks share stages."""
