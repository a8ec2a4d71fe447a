"""How a network is computed, how fast that is, and how much memory it takes."""
