# One image for workers, connectors and migrations. No container engine runs in the tests; what the second stage does, installing the
# worker's lock and running from a bare directory, tests/adversity/test_image_layout.py does without one.

# Compilers, if a locked version has no wheel for this machine, stay here.
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1
# Before the sources: the layer is made anew only where a version changes. The worker's lock has no embedded engine.
COPY requirements-worker.lock ./
RUN python -m venv /venv \
 && /venv/bin/pip install --disable-pip-version-check --require-hashes -r requirements-worker.lock

FROM python:3.11-slim-bookworm
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/app PATH=/venv/bin:$PATH
WORKDIR /app
COPY --from=build /venv /venv
COPY preservarium ./preservarium
COPY agents ./agents
COPY tables ./tables
COPY migrations ./migrations
COPY examples ./examples

RUN useradd --system --uid 10001 --user-group preservarium && mkdir /data && chown preservarium:preservarium /data
USER 10001:10001
VOLUME /data
EXPOSE 6066 8080

# Of a worker; compose.yaml has others for the connectors. It asks for what a restart can mend, and for no dependency.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
  CMD ["python", "-m", "preservarium.serving.probe"]

# SIGTERM lets the batches in hand finish and commit.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "faust", "-A", "preservarium", "worker", "-l", "info"]
