"""What the files of a run folder are called."""

CONFIG_FILE = "config.yaml"  # the options it was started with
METRICS_FILE = "metrics.jsonl"  # an entry for each epoch
HISTORY_FILE = "history.jsonl"  # how a search stood after each epoch, and what it pruned
FOUND_FILE = "found.json"  # sizes found, and how they were chosen
IMPORTANCE_FILE = "importance.json"  # learned importance beside the loss without a unit
LATENCY_FILE = "latency.json"  # the table behind a target of latency
FIGURES_FILE = "figures.json"  # accuracy and costs of its networks
RECONSTRUCTION_FILE = "reconstruction.png"  # what was rebuilt of masked images
EXPORT_FOLDER = "export"  # the network
REPORT_FOLDER = "report"
