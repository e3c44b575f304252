"""What stands behind `gns.finetune`: data, models, a run's folder, and how fast this machine is."""
