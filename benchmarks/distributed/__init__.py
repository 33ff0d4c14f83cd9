"""What clipping costs on several processes, and whether they compute what one computes; see ``__main__``."""
