"""What the ingress's tests share: queues of each engine."""
