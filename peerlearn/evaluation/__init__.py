"""What evaluators share: networks, features, scores, tables, pictures."""
