"""What NVFlare builds in a job: learner, outgoing filter, guard, aggregator, persistor."""
