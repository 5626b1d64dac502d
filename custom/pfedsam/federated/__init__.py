"""The NVFlare side: learner, outgoing filter, guard, persistor. The only room that imports nvflare."""
