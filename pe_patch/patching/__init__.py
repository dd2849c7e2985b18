"""Put a scheme into a model, and take it out again."""
