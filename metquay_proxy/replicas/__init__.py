"""What several proxies share through Redis: the quota, and the records of Idempotency-Keys."""
