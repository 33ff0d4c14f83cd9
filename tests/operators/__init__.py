"""PyTorch's own database of operators as a judge: every operator is exact, or refused by a message of clipgrad's."""
