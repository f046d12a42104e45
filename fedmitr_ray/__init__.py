"""The server phase on Ray: what `fedmitr_flwr` asks of workers elsewhere, by the settings `workers` and `ray-address`.

Ray does the work of a scheduler: it places the tasks, and does those of a worker that died again.
"""
