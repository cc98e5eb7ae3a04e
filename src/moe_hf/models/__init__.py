"""Model code. The files of this folder are uploaded to the Hub together with a checkpoint."""
