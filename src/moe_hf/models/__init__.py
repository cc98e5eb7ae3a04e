"""Model code: the files of this folder travel to the Hub together with a checkpoint."""
