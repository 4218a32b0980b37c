"""What Ray's processes find in their environment where it is we who start them."""

METRICS_CLOSED = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""No ports for metrics: on all of a machine's addresses they answer whoever asks, without Ray's token, also where Ray
was told to stay on loopback. Its other ports want the token. -1 is Ray's own mark of a port that isn't there."""
