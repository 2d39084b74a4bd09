"""What compressed key-value caches keep: a needle in a text, and the likelihood of what follows."""
