-- Canaries: a new version of a parser, or new bounds, first for a share of the devices (preservarium/stores/canaries.py). Their story is in
-- event_store, stream canary/<name>; these are the projection, and what workers count.

CREATE TABLE canaries (
  name       text PRIMARY KEY,
  rev        bigint      NOT NULL UNIQUE,
  version    bigint      NOT NULL,
  doc        json        NOT NULL,
  updated_at timestamptz NOT NULL,
  updated_by text        NOT NULL);

CREATE TABLE canary_counts (
  canary     text        NOT NULL,
  started_at timestamptz NOT NULL,
  percent    integer     NOT NULL,
  worker     text        NOT NULL,
  compared   bigint      NOT NULL DEFAULT 0,
  different  bigint      NOT NULL DEFAULT 0,
  broken     bigint      NOT NULL DEFAULT 0,
  mended     bigint      NOT NULL DEFAULT 0,
  skipped    bigint      NOT NULL DEFAULT 0,
  examples   jsonb       NOT NULL DEFAULT '[]',
  updated_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (canary, started_at, percent, worker));
COMMENT ON COLUMN canary_counts.broken IS 'Refused by the candidate, and not by what is in force.';
COMMENT ON COLUMN canary_counts.mended IS 'Refused by what is in force, and not by the candidate.';
COMMENT ON COLUMN canary_counts.skipped IS 'Not compared, because too many came at once.';
