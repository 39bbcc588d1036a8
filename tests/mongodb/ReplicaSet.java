import de.bwaldvogel.mongo.MongoCollection;
import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.backend.h2.H2Backend;
import de.bwaldvogel.mongo.bson.BsonTimestamp;
import de.bwaldvogel.mongo.bson.Document;
import de.bwaldvogel.mongo.exception.MongoServerError;
import de.bwaldvogel.mongo.exception.MongoServerException;
import io.netty.channel.Channel;
import java.time.Instant;
import java.util.Comparator;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.stream.Stream;

/**
 * A stand-in for MongoDB, not MongoDB's own server: mongo-java-server in a file, as a replica set of one.
 *
 * <p>What that project lacks for change streams, and a driver needs, is added: the handshake of a replica set, the
 * token of an answer (postBatchResumeToken), an answer that waits for news, the key of an updated document, and the error
 * of a place that the log has no more (its entries may be deleted from local.oplog.rs). Writes are in the file when they
 * are acknowledged.
 */
public final class ReplicaSet extends H2Backend {
  private static final Set<String> WRITES = Set.of("insert", "update", "delete", "drop", "findandmodify");
  private static final long POLL_MS = 10;
  /** Past what a driver asks for: a forgotten question must not hold a thread. */
  private static final long WAIT_MAX_MS = 2_000;

  private final String address;
  /** Of the log's times, also while a test has emptied it. */
  private BsonTimestamp newest = new BsonTimestamp(0);
  private final Map<Long, Boolean> streams = new ConcurrentHashMap<>();

  private ReplicaSet(String file, String address) {
    super(file);
    this.address = address;
    enableOplog();
    if (entries().findAny().isEmpty()) {
      // A replica set's log is never empty: its initiation is the first entry.
      log().addDocument(
          new Document("ts", new BsonTimestamp(Instant.now(), 0))
              .append("op", "n")
              .append("ns", "admin.initiated")
              .append("o", new Document()));
    }
    commit();
  }

  public static void main(String[] arguments) {
    int port = Integer.parseInt(arguments[1]);
    MongoServer server = new MongoServer(new ReplicaSet(arguments[0], "127.0.0.1:" + port));
    Runtime.getRuntime().addShutdownHook(new Thread(server::shutdownNow));
    server.bind("127.0.0.1", port);
  }

  @SuppressWarnings("unchecked")
  private MongoCollection<Document> log() {
    return (MongoCollection<Document>) resolveDatabase("local").resolveCollection("oplog.rs", true);
  }

  private Stream<Document> entries() {
    return log().queryAllAsStream();
  }

  private static BsonTimestamp time(Document entry) {
    return (BsonTimestamp) entry.get("ts");
  }

  private BsonTimestamp newest() {
    newest = entries().map(ReplicaSet::time).max(Comparator.naturalOrder()).orElse(newest);
    return newest;
  }

  private boolean lost(BsonTimestamp place) {
    return entries().map(ReplicaSet::time).min(Comparator.naturalOrder()).map(oldest -> oldest.compareTo(place) > 0).orElse(true);
  }

  @Override
  public Document handleCommand(Channel channel, String database, String command, Document query) {
    switch (command.toLowerCase(Locale.ROOT)) {
      case "hello", "ismaster" -> {
        return hello(super.handleCommand(channel, database, "ismaster", query));
      }
      case "aggregate" -> {
        if (changeStream(query) instanceof Document options) {
          return opened(channel, database, command, query, options);
        }
      }
      case "getmore" -> {
        if (streams.containsKey(((Number) query.get(command)).longValue())) {
          return news(channel, database, command, query);
        }
      }
      default -> {}
    }
    // One command at a time: entries of the log are there in the order of their times, without holes.
    synchronized (this) {
      Document answer = super.handleCommand(channel, database, command, query);
      if (WRITES.contains(command.toLowerCase(Locale.ROOT))) {
        commit();
      }
      return answer;
    }
  }

  private synchronized Document hello(Document answer) {
    return answer
        // Of MongoDB 4.4, the least that drivers take.
        .append("maxWireVersion", 9)
        .append("isWritablePrimary", true)
        .append("secondary", false)
        .append("setName", "standin")
        .append("setVersion", 1)
        .append("hosts", List.of(address))
        .append("me", address)
        .append("primary", address)
        .append("operationTime", newest());
  }

  private static Object changeStream(Document query) {
    Object pipeline = query.get("pipeline");
    return pipeline instanceof List<?> stages && !stages.isEmpty()
        ? ((Document) stages.get(0)).get("$changeStream")
        : null;
  }

  private synchronized Document opened(
      Channel channel, String database, String command, Document query, Document options) {
    Document place = (Document) options.getOrDefault("resumeAfter", options.get("startAfter"));
    if (place != null) {
      BsonTimestamp after = new BsonTimestamp(Long.parseLong((String) place.get("_data"), 16));
      if (lost(after)) {
        throw new MongoServerError(
            286, "ChangeStreamHistoryLost", "Resume of change stream was not possible, as the resume point may no longer be in the oplog.");
      }
    }
    Document answer = completed(super.handleCommand(channel, database, command, query));
    streams.put(((Number) ((Document) answer.get("cursor")).get("id")).longValue(), true);
    return answer;
  }

  private Document news(Channel channel, String database, String command, Document query) {
    long until = System.currentTimeMillis() + Math.min(WAIT_MAX_MS, ((Number) query.getOrDefault("maxTimeMS", 0)).longValue());
    while (true) {
      synchronized (this) {
        Document answer = completed(super.handleCommand(channel, database, command, query));
        if (!batch(answer).isEmpty() || System.currentTimeMillis() >= until) {
          return answer;
        }
      }
      try {
        Thread.sleep(POLL_MS);
      } catch (InterruptedException e) {
        throw new MongoServerException("stopping", e);
      }
    }
  }

  @SuppressWarnings("unchecked")
  private static List<Document> batch(Document answer) {
    Document cursor = (Document) answer.get("cursor");
    return (List<Document>) cursor.getOrDefault("nextBatch", cursor.get("firstBatch"));
  }

  private Document completed(Document answer) {
    List<Document> events = batch(answer);
    events.stream().filter(event -> "update".equals(event.get("operationType"))).forEach(this::keyed);
    ((Document) answer.get("cursor"))
        .put(
            "postBatchResumeToken",
            events.isEmpty()
                ? new Document("_data", Long.toHexString(newest().getValue()))
                : events.get(events.size() - 1).get("_id"));
    return answer;
  }

  private void keyed(Document event) {
    Object at = event.get("clusterTime");
    Document entry = entries().filter(e -> e.get("ts").equals(at)).findAny().orElseThrow();
    event.put("documentKey", entry.get("o2"));
    if (!(event.get("fullDocument") instanceof Document full) || !full.containsKey("_id")) {
      // It has gone meanwhile.
      event.put("fullDocument", null);
    }
  }
}
