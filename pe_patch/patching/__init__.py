"""Put a scheme into a model, take it out again, and save both together."""
