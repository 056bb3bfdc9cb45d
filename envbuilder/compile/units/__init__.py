"""Translation units: their drivers, the service that answers them, the broker, the object cache."""
