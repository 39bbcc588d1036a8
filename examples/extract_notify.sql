-- For the owner of a PostgreSQL database that Preservarium extracts from. Optional: with these triggers a change is seen at
-- once, and a deletion when it happens; without them at the next look, and at the next comparison of all keys.
-- A statement notifies once, however many rows it changes; only deletions name their rows. Needs no further right.
-- Adapt the names of tables and keys; the channel is PRESERVARIUM_EXTRACT__CHANNEL.

CREATE OR REPLACE FUNCTION preservarium_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('preservarium_extract', '');
  RETURN NULL;
END $$;

-- Arguments: `tasks` or `employees`, and the column that is the key.
CREATE OR REPLACE FUNCTION preservarium_gone() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('preservarium_extract', json_build_object('table', TG_ARGV[0], 'gone', to_jsonb(OLD) ->> TG_ARGV[1])::text);
  RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER preservarium_changed AFTER INSERT OR UPDATE ON tasks
  FOR EACH STATEMENT EXECUTE FUNCTION preservarium_changed();
CREATE OR REPLACE TRIGGER preservarium_gone AFTER DELETE ON tasks
  FOR EACH ROW EXECUTE FUNCTION preservarium_gone('tasks', 'id');
CREATE OR REPLACE TRIGGER preservarium_changed AFTER INSERT OR UPDATE ON employees
  FOR EACH STATEMENT EXECUTE FUNCTION preservarium_changed();
CREATE OR REPLACE TRIGGER preservarium_gone AFTER DELETE ON employees
  FOR EACH ROW EXECUTE FUNCTION preservarium_gone('employees', 'id');

-- What a look needs in order to be cheap. Without it each look reads the whole table.
CREATE INDEX IF NOT EXISTS tasks_by_updated_at ON tasks (updated_at, id);
CREATE INDEX IF NOT EXISTS employees_by_updated_at ON employees (updated_at, id);
