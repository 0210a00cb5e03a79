"""What a run is told, and what it chooses by the machine."""
