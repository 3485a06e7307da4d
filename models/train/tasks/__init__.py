"""What the demo network learns. Each task makes a question and its only right answer from a random generator."""
