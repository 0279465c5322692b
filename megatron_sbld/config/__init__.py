"""The sections of a config, their files and checks, and what follows from them."""
