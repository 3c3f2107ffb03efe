"""Who changed what, and who was refused."""
