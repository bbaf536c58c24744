"""Runs a bundle: sessions, generation, verification; never imports torch itself."""
