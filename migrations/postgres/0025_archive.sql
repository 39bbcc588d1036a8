-- The archive of raw records: which ranges of offsets lie in which file, and how far each partition is archived.
-- A file counts where a row names it. Its row is written in the transaction that moves the partition's position, so no offset is in two files.

CREATE TABLE archive_positions (
  topic        text NOT NULL,
  epoch        integer NOT NULL,
  partition    integer NOT NULL,
  next_offset  bigint NOT NULL,
  day          date,
  plan         jsonb,
  owner        text,
  leased_until timestamptz,
  archived_at  timestamptz,
  PRIMARY KEY (topic, epoch, partition));
COMMENT ON TABLE archive_positions IS 'How far each partition is archived, and who is at it.';
COMMENT ON COLUMN archive_positions.epoch IS 'archive.epoch: another one since the topic was made anew.';
COMMENT ON COLUMN archive_positions.next_offset IS 'The first offset that is in no file yet.';
COMMENT ON COLUMN archive_positions.day IS 'Of the last file: days do not go back.';
COMMENT ON COLUMN archive_positions.plan IS 'The file that is being uploaded; whoever finds it makes its row, or takes the file away.';
COMMENT ON COLUMN archive_positions.archived_at IS 'When the partition was last archived to its end; NULL: never.';

CREATE TABLE archive_segments (
  topic        text NOT NULL,
  epoch        integer NOT NULL,
  partition    integer NOT NULL,
  first_offset bigint NOT NULL,
  next_offset  bigint NOT NULL CHECK (next_offset > first_offset),
  day          date NOT NULL,
  path         text NOT NULL UNIQUE,
  records      bigint NOT NULL,
  value_bytes  bigint NOT NULL,
  file_bytes   bigint NOT NULL,
  sha256       text NOT NULL,
  min_time     timestamptz NOT NULL,
  max_time     timestamptz NOT NULL,
  archived_at  timestamptz NOT NULL DEFAULT now(),
  deleted_at   timestamptz,
  PRIMARY KEY (topic, epoch, partition, first_offset));
COMMENT ON TABLE archive_segments IS 'Files of the archive: offsets from first_offset to before next_offset.';
COMMENT ON COLUMN archive_segments.path IS 'Below archive.url.';
COMMENT ON COLUMN archive_segments.value_bytes IS 'Of keys and values, as they were in Kafka.';
COMMENT ON COLUMN archive_segments.min_time IS 'Kafka''s time of the oldest record in it.';
COMMENT ON COLUMN archive_segments.deleted_at IS 'Its time is over (archive.keep_days): the file is being deleted.';
CREATE INDEX archive_segments_time ON archive_segments (max_time);

CREATE TABLE archive_gaps (
  topic        text NOT NULL,
  epoch        integer NOT NULL,
  partition    integer NOT NULL,
  first_offset bigint NOT NULL,
  next_offset  bigint NOT NULL CHECK (next_offset > first_offset),
  lost         boolean NOT NULL,
  found_at     timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (topic, epoch, partition, first_offset));
COMMENT ON TABLE archive_gaps IS 'Offsets between the files that are in none.';
COMMENT ON COLUMN archive_gaps.lost IS 'Kafka had deleted them before they were archived; otherwise no record ever stood there.';
