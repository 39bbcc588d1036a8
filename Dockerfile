# One image for workers, connectors and migrations. Not built by the tests: no container engine runs there.
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PYTHONPATH=/app
WORKDIR /app

# Before the sources: the layer is made anew only where a version changes. The worker's lock has no embedded engine.
COPY requirements-worker.lock ./
RUN pip install --disable-pip-version-check --require-hashes -r requirements-worker.lock

COPY preservarium ./preservarium
COPY agents ./agents
COPY tables ./tables
COPY migrations ./migrations
COPY examples ./examples

RUN useradd --system --uid 10001 preservarium && mkdir /data && chown preservarium /data
USER preservarium
VOLUME /data
EXPOSE 6066 8080

CMD ["python", "-m", "faust", "-A", "preservarium", "worker", "-l", "info"]
