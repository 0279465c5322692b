"""What a run is going to drop, before it starts."""
