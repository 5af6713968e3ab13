// Starts, signals and cancels runs from Java with nothing of streamflow but its schemas: single-object Avro, no registry.
//
// Needs org.apache.kafka:kafka-clients and org.apache.avro:avro.
//
// java Plain schemas localhost:9092 shop start  order-1 fulfil '[{"id": "order-1", "total": 30}]'
// java Plain schemas localhost:9092 shop signal order-1 approved true
// java Plain schemas localhost:9092 shop cancel order-1
//
// Prints the partition that Kafka's default partitioner chose, and the worker's answer.

import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import org.apache.avro.Schema;
import org.apache.avro.generic.GenericData;
import org.apache.avro.generic.GenericRecord;
import org.apache.avro.generic.GenericRecordBuilder;
import org.apache.avro.message.BinaryMessageDecoder;
import org.apache.avro.message.BinaryMessageEncoder;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

public final class Plain {
    static final Duration PATIENCE = Duration.ofSeconds(30);

    /** The schema of one of the bodies of a command, by its name. */
    static Schema body(Schema command, String name) {
        return command.getField("body").schema().getTypes().stream()
                .filter(branch -> branch.getName().equals(name))
                .findFirst()
                .orElseThrow();
    }

    /** JSON as Avro's bytes. */
    static ByteBuffer json(String text) {
        return ByteBuffer.wrap(text.getBytes(StandardCharsets.UTF_8));
    }

    /** What is asked: fields that are not set have the defaults of the schema. */
    static GenericRecord asked(Schema command, String[] args) {
        return switch (args[3]) {
            case "start" -> new GenericRecordBuilder(body(command, "StartWorkflow"))
                    .set("workflow", args[5]).set("args", json(args[6])).build();
            case "signal" -> new GenericRecordBuilder(body(command, "SignalWorkflow"))
                    .set("name", args[5]).set("value", json(args[6])).build();
            case "cancel" -> new GenericRecordBuilder(body(command, "CancelWorkflow")).build();
            default -> throw new IllegalArgumentException("start, signal or cancel, found " + args[3]);
        };
    }

    public static void main(String[] args) throws Exception {
        var command = new Schema.Parser().parse(Path.of(args[0], "Command.avsc").toFile());
        var reply = new Schema.Parser().parse(Path.of(args[0], "Reply.avsc").toFile());
        Map<String, Object> settings = Map.of("bootstrap.servers", args[1], "acks", "all");
        String app = args[2], workflowId = args[4], commandId = UUID.randomUUID().toString();
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new ByteArraySerializer());
                var consumer = new KafkaConsumer<>(settings, new StringDeserializer(), new ByteArrayDeserializer())) {
            // The answer comes to the one partition that the command names; we read it from its end on.
            int replyTo = Math.floorMod(commandId.hashCode(), consumer.partitionsFor(app + ".replies").size());
            var place = new TopicPartition(app + ".replies", replyTo);
            consumer.assign(List.of(place));
            consumer.seekToEnd(List.of(place));
            consumer.position(place);

            var record = new GenericRecordBuilder(command)
                    .set("command_id", commandId).set("workflow_id", workflowId)
                    .set("sent_at", System.currentTimeMillis()).set("reply_to", replyTo)
                    .set("body", asked(command, args)).build();
            var value = new BinaryMessageEncoder<GenericRecord>(GenericData.get(), command).encode(record);
            byte[] bytes = new byte[value.remaining()];
            value.get(bytes);
            var sent = producer.send(new ProducerRecord<>(app + ".commands", workflowId, bytes)).get();

            var decoder = new BinaryMessageDecoder<GenericRecord>(GenericData.get(), reply);
            long until = System.nanoTime() + PATIENCE.toNanos();
            while (System.nanoTime() < until) {
                for (ConsumerRecord<String, byte[]> found : consumer.poll(Duration.ofMillis(200))) {
                    if (found.key().equals(commandId)) {
                        var answer = decoder.decode(ByteBuffer.wrap(found.value()));
                        System.out.printf("{\"partition\": %d, \"reply_to\": %d, \"accepted\": %s, \"error\": %s}%n",
                                sent.partition(), replyTo, answer.get("accepted"), answer.get("error"));
                        return;
                    }
                }
            }
        }
        throw new IllegalStateException("no worker of app " + app + " answered within " + PATIENCE);
    }
}
