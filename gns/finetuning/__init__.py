"""What stands behind `gns.finetune`: data, models, a run's folder, and the times of steps."""
