"""What a patch would do, told without touching anything: explain, the list of methods, bytes, recommendations."""
