/* Asks an HTTP server the same thing over many connections at once and writes down, as JSON, when the answers came.
 *
 * A connection (a stream) sends its requests one after the other, each once the answer before it is whole. Answers may
 * be server-sent events, which are looked at one by one, however they are cut into reads and chunks, or plain bodies.
 * Tokens are counted by the usage that the server reports, as one event may hold several; a gap is the time between two
 * reads that brought text. It is in C so that what it costs does not hide what the server costs; it says what it costs.
 *
 * The program that starts it (scripts/bench_inference.py) gives it sane arguments; what comes from the server is
 * bounded here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 16384, LINE_BYTES = 262144, READ_BYTES = 65536, MOST_STREAMS = 60000, EVENTS_AT_ONCE = 256 };

typedef enum { IN_HEAD, IN_BODY, IN_CHUNK_SIZE, IN_CHUNK, AFTER_CHUNK, IN_TRAILER } Part;

/* One request and what came of it. Times are in seconds, from the moment it was sent. */
typedef struct {
    int stream, status;
    double sent, first, last, whole; /* `sent` is a point in time, `first` and `last` are of text; -1: none came */
    long events, texts, tokens;      /* tokens: -1 where no usage came */
    long bytes;
    const char *error; /* NULL: it was answered */
    double *gaps;
    size_t gap_count, gap_room;
    bool is_done; /* [DONE] came */
} Result;

typedef struct {
    int fd, index, left; /* left: requests still to be sent, without the one under way */
    bool is_waiting;     /* a request is under way */
    Result *result;
    size_t written;
    Part part;
    bool closes; /* the server closes the connection after this answer */
    long body_left; /* of the body or the chunk; -1: until the connection ends */
    char *head, *line;
    size_t head_length, line_length;
} Stream;

static struct {
    const char *host, *port, *path, *body_file, *authorization;
    int streams, requests, at_once;
    double timeout;
    bool hold;
} given = {.host = "127.0.0.1", .path = "/", .streams = 1, .requests = 1, .timeout = 60};

static struct addrinfo *address;
static char *request;
static size_t request_length;
static int poll_fd, under_way, next_stream;
static Stream *streams;
static Result *results;
static size_t result_count;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "load_generator: %s: %s\n", what, why);
    exit(1);
}

static void *room(void *old, size_t count, size_t size) {
    void *found = reallocarray(old, count, size);
    if (!found) fail("memory", "there is none left");
    return found;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Sending */

static void close_stream(Stream *stream) {
    if (stream->fd >= 0) close(stream->fd); /* which takes it out of epoll too */
    stream->fd = -1;
}

static bool open_stream(Stream *stream) {
    int one = 1;
    stream->fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC, address->ai_protocol);
    if (stream->fd < 0) fail("socket", strerror(errno));
    setsockopt(stream->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = stream};
    if (connect(stream->fd, address->ai_addr, address->ai_addrlen) < 0 ||
        epoll_ctl(poll_fd, EPOLL_CTL_ADD, stream->fd, &event) < 0) {
        close_stream(stream);
        return false;
    }
    return true;
}

static void want(Stream *stream, unsigned events) {
    struct epoll_event event = {.events = events, .data.ptr = stream};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, stream->fd, &event);
}

static void send_request(Stream *stream);

/* The request under way has ended, for this reason if it is none that was wished for. */
static void end_request(Stream *stream, const char *error) {
    Result *result = stream->result;
    result->error = error;
    result->whole = now() - result->sent;
    stream->is_waiting = false;
    under_way--;
    if (error || stream->closes) close_stream(stream);
    if (stream->left > 0) {
        send_request(stream);
    } else if (!given.hold) {
        close_stream(stream);
    }
}

static void write_request(Stream *stream) {
    while (stream->written < request_length) {
        ssize_t count = send(stream->fd, request + stream->written, request_length - stream->written,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) {
            want(stream, EPOLLIN | EPOLLOUT);
            return;
        }
        if (count < 0) {
            end_request(stream, "the server closed the connection");
            return;
        }
        stream->written += (size_t)count;
        if (stream->written == request_length) want(stream, EPOLLIN);
    }
}

static void send_request(Stream *stream) {
    stream->left--;
    stream->is_waiting = true;
    under_way++;
    stream->result = &results[result_count++];
    *stream->result = (Result){.stream = stream->index, .first = -1, .last = -1, .tokens = -1};
    stream->written = stream->head_length = stream->line_length = 0;
    stream->part = IN_HEAD;
    stream->closes = false;
    bool is_open = stream->fd >= 0 || open_stream(stream);
    stream->result->sent = now();
    if (is_open) {
        write_request(stream);
    } else {
        stream->left = 0; /* others would fare no better */
        end_request(stream, "the server takes no connection");
    }
}

/* Reading: the events */

/* Where the value of a key begins, with its quotes; quotes within JSON texts are escaped, so keys are not found there. */
static const char *value_of(const char *json, const char *key) {
    const char *found = strstr(json, key);
    if (!found) return NULL;
    found += strlen(key);
    while (*found == ' ') found++;
    if (*found++ != ':') return NULL;
    while (*found == ' ') found++;
    return found;
}

static bool has_text(const char *json) {
    static const char *const keys[] = {"\"content\"", "\"text\"", "\"delta\""};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *value = value_of(json, keys[i]);
        if (value && value[0] == '"' && value[1] != '"') return true;
    }
    return false;
}

static void take_line(Stream *stream) {
    Result *result = stream->result;
    char *line = stream->line;
    size_t length = stream->line_length;
    stream->line_length = 0;
    if (length && line[length - 1] == '\r') length--;
    if (!length) return;
    line[length] = '\0';
    if (strncmp(line, "data:", 5) == 0) {
        line += line[5] == ' ' ? 6 : 5;
        if (strcmp(line, "[DONE]") == 0) {
            result->is_done = true;
            return;
        }
        result->events++;
    } else if (*line != '{') {
        return; /* another field of an event, or a comment */
    }
    if (has_text(line)) result->texts++;
    const char *tokens = value_of(line, "\"completion_tokens\"");
    if (tokens && *tokens >= '0' && *tokens <= '9') result->tokens = strtol(tokens, NULL, 10);
    if (strncmp(line, "{\"error\"", 8) == 0) result->error = "the server answered with an error";
}

/* Takes bytes of the body. Says what is wrong with them, or NULL. */
static const char *take_body(Stream *stream, const char *bytes, size_t length) {
    stream->result->bytes += (long)length;
    while (length) {
        const char *end = memchr(bytes, '\n', length);
        size_t count = end ? (size_t)(end - bytes) : length;
        if (stream->line_length + count >= LINE_BYTES) return "the server sent a line that is too long";
        memcpy(stream->line + stream->line_length, bytes, count);
        stream->line_length += count;
        if (end) {
            take_line(stream);
            count++;
        }
        bytes += count;
        length -= count;
    }
    return NULL;
}

/* Reading: HTTP */

static bool header_is(const char *line, const char *name, const char **value) {
    size_t length = strlen(name);
    if (strncasecmp(line, name, length) != 0 || line[length] != ':') return false;
    *value = line + length + 1;
    while (**value == ' ') (*value)++;
    return true;
}

/* Reads the head, which is whole and ends with an empty line. */
static const char *take_head(Stream *stream) {
    char *rest = stream->head;
    stream->head[stream->head_length] = '\0';
    char *line = strsep(&rest, "\n");
    if (sscanf(line, "HTTP/1.%*1[01] %3d", &stream->result->status) != 1) return "the server does not speak HTTP/1.1";
    stream->body_left = -1;
    stream->part = IN_BODY;
    while ((line = strsep(&rest, "\n")) != NULL) {
        const char *value;
        line[strcspn(line, "\r")] = '\0';
        if (header_is(line, "content-length", &value)) {
            stream->body_left = strtol(value, NULL, 10);
            if (stream->body_left < 0) return "the server sent a Content-Length that is none";
        } else if (header_is(line, "transfer-encoding", &value) && strcasestr(value, "chunked")) {
            stream->part = IN_CHUNK_SIZE;
            stream->head_length = 0;
        } else if (header_is(line, "connection", &value) && strcasestr(value, "close")) {
            stream->closes = true;
        }
    }
    if (stream->part == IN_CHUNK_SIZE) stream->body_left = 0;
    else if (stream->body_left < 0) stream->closes = true;
    return NULL;
}

static void end_answer(Stream *stream) {
    if (stream->line_length) take_line(stream); /* a body that does not end with a line's end */
    const char *error = stream->result->error;
    if (!error && stream->result->status != 200) error = "the status is not 200";
    if (!error && stream->result->events && !stream->result->is_done) error = "the stream ended without [DONE]";
    end_request(stream, error);
}

/* Takes a byte of a line of the head, or between chunks. Returns whether the line is whole, without its end. */
static bool take_byte(Stream *stream, char byte, const char **error) {
    if (stream->head_length + 1 >= HEAD_BYTES) *error = "the server sent a head that is too long";
    else stream->head[stream->head_length++] = byte;
    return byte == '\n';
}

static bool is_empty_line(const Stream *stream) {
    return stream->head_length == 1 || (stream->head_length == 2 && stream->head[0] == '\r');
}

/* Takes what was read. Returns whether the answer goes on. */
static bool take(Stream *stream, const char *bytes, size_t length) {
    const char *error = NULL;
    for (size_t at = 0; at < length && !error;) {
        switch (stream->part) {
        case IN_HEAD:
            if (take_byte(stream, bytes[at++], &error) && !error) {
                size_t end = stream->head_length;
                bool is_whole = (end >= 4 && memcmp(stream->head + end - 4, "\r\n\r\n", 4) == 0);
                if (is_whole) error = take_head(stream);
                if (is_whole && !error && stream->part == IN_BODY && stream->body_left == 0) goto whole;
            }
            break;
        case IN_BODY:
        case IN_CHUNK: {
            size_t count = length - at;
            if (stream->body_left >= 0 && count > (size_t)stream->body_left) count = (size_t)stream->body_left;
            error = take_body(stream, bytes + at, count);
            at += count;
            if (stream->body_left >= 0) stream->body_left -= (long)count;
            if (stream->body_left == 0) {
                if (stream->part == IN_BODY && !error) goto whole;
                stream->part = AFTER_CHUNK;
                stream->head_length = 0;
            }
            break;
        }
        case AFTER_CHUNK:
            if (take_byte(stream, bytes[at++], &error)) {
                stream->part = IN_CHUNK_SIZE;
                stream->head_length = 0;
            }
            break;
        case IN_CHUNK_SIZE:
            if (take_byte(stream, bytes[at++], &error) && !error) {
                char *end;
                stream->head[stream->head_length] = '\0';
                stream->body_left = strtol(stream->head, &end, 16);
                if (end == stream->head || stream->body_left < 0) error = "the server sent a chunk without a size";
                stream->part = stream->body_left ? IN_CHUNK : IN_TRAILER;
                stream->head_length = 0;
            }
            break;
        case IN_TRAILER:
            if (take_byte(stream, bytes[at++], &error)) {
                if (is_empty_line(stream)) goto whole;
                stream->head_length = 0;
            }
            break;
        }
    }
    if (!error) return true;
    end_request(stream, error);
    return false;
whole:
    end_answer(stream);
    return false;
}

static void note_text(Result *result) {
    double time = now() - result->sent;
    if (result->first < 0) {
        result->first = time;
    } else {
        if (result->gap_count == result->gap_room) {
            result->gap_room = result->gap_room ? 2 * result->gap_room : 64;
            result->gaps = room(result->gaps, result->gap_room, sizeof *result->gaps);
        }
        result->gaps[result->gap_count++] = time - result->last;
    }
    result->last = time;
}

static void read_answer(Stream *stream) {
    static char bytes[READ_BYTES];
    ssize_t count = recv(stream->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (!stream->is_waiting) { /* it says something unasked, or leaves */
        if (count <= 0) close_stream(stream);
        return;
    }
    Result *result = stream->result;
    if (count <= 0) {
        if (count == 0 && stream->part == IN_BODY && stream->body_left < 0) end_answer(stream);
        else end_request(stream, "the server closed the connection");
        return;
    }
    long texts = result->texts;
    take(stream, bytes, (size_t)count);
    if (result->texts > texts) note_text(result);
}

/* The whole run */

static void start_streams(void) {
    while (next_stream < given.streams && under_way < given.at_once) {
        Stream *stream = &streams[next_stream++];
        send_request(stream);
    }
}

static void run(void) {
    struct epoll_event events[EVENTS_AT_ONCE];
    double looked = now();
    for (start_streams(); under_way > 0; start_streams()) {
        int count = epoll_wait(poll_fd, events, EVENTS_AT_ONCE, 100);
        if (count < 0 && errno != EINTR) fail("epoll", strerror(errno));
        for (int i = 0; i < count; i++) {
            Stream *stream = events[i].data.ptr;
            if (stream->fd >= 0 && events[i].events & EPOLLOUT && stream->is_waiting) write_request(stream);
            if (stream->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_answer(stream);
        }
        if (now() - looked < 0.1) continue;
        looked = now();
        for (int i = 0; i < next_stream; i++) {
            if (streams[i].is_waiting && looked - streams[i].result->sent > given.timeout) {
                end_request(&streams[i], "no whole answer in time");
            }
        }
    }
}

static double cpu_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void print_results(double seconds) {
    printf("{\"seconds\": %.6f, \"cpu_seconds\": %.6f, \"requests\": [", seconds, cpu_seconds());
    for (size_t i = 0; i < result_count; i++) {
        const Result *one = &results[i];
        printf("%s\n{\"stream\": %d, \"status\": %d, \"seconds\": %.6f, \"events\": %ld, \"texts\": %ld, \"bytes\": %ld",
               i ? "," : "", one->stream, one->status, one->whole, one->events, one->texts, one->bytes);
        if (one->tokens >= 0) printf(", \"tokens\": %ld", one->tokens);
        else printf(", \"tokens\": null");
        if (one->first >= 0) printf(", \"first_s\": %.6f, \"last_s\": %.6f", one->first, one->last);
        else printf(", \"first_s\": null, \"last_s\": null");
        if (one->error) printf(", \"error\": \"%s\", \"gaps_s\": [", one->error); /* of this file: nothing to escape */
        else printf(", \"error\": null, \"gaps_s\": [");
        for (size_t gap = 0; gap < one->gap_count; gap++) printf("%s%.6f", gap ? "," : "", one->gaps[gap]);
        printf("]}");
    }
    printf("]}\n");
    fflush(stdout);
}

/* Keeps the connections until the standard input ends, and says how many the server has kept too. */
static void hold(void) {
    char bytes[256];
    int open = 0;
    while (read(STDIN_FILENO, bytes, sizeof bytes) > 0) {}
    for (int i = 0; i < given.streams; i++) {
        if (streams[i].fd < 0) continue;
        ssize_t count = recv(streams[i].fd, bytes, sizeof bytes, MSG_DONTWAIT | MSG_PEEK);
        if (count > 0 || (count < 0 && (errno == EAGAIN || errno == EINTR))) open++;
    }
    printf("{\"still_open\": %d}\n", open);
}

static char *read_file(const char *name, size_t *length) {
    FILE *file = fopen(name, "rb");
    char *bytes = NULL;
    if (!file) fail(name, strerror(errno));
    *length = 0;
    for (size_t count = 1; count;) {
        bytes = room(bytes, *length + READ_BYTES, 1);
        count = fread(bytes + *length, 1, READ_BYTES, file);
        *length += count;
    }
    fclose(file);
    return bytes;
}

static void make_request(void) {
    size_t body_length = 0;
    char *body = given.body_file ? read_file(given.body_file, &body_length) : NULL;
    char length[64] = "";
    if (body) snprintf(length, sizeof length, "Content-Type: application/json\r\nContent-Length: %zu\r\n", body_length);
    const char *key = given.authorization;
    char *head;
    int count = asprintf(&head, "%s %s HTTP/1.1\r\nHost: %s:%s\r\nAccept: */*\r\n%s%s%s%s\r\n", body ? "POST" : "GET",
                         given.path, given.host, given.port, key ? "Authorization: " : "", key ? key : "",
                         key ? "\r\n" : "", length);
    if (count < 0) fail("memory", "there is none left");
    request_length = (size_t)count + body_length;
    request = room(head, request_length + 1, 1);
    if (body) memcpy(request + count, body, body_length);
    free(body);
}

static void read_arguments(int count, char **values) {
    static const struct option options[] = {
        {"host", required_argument, NULL, 'h'},     {"port", required_argument, NULL, 'p'},
        {"path", required_argument, NULL, 'u'},     {"body", required_argument, NULL, 'b'},
        {"streams", required_argument, NULL, 's'},  {"requests", required_argument, NULL, 'r'},
        {"at-once", required_argument, NULL, 'a'},  {"timeout", required_argument, NULL, 't'},
        {"authorization", required_argument, NULL, 'k'}, {"hold", no_argument, NULL, 'o'}, {NULL, 0, NULL, 0}};
    for (int option; (option = getopt_long(count, values, "", options, NULL)) != -1;) {
        switch (option) {
        case 'h': given.host = optarg; break;
        case 'p': given.port = optarg; break;
        case 'u': given.path = optarg; break;
        case 'b': given.body_file = optarg; break;
        case 's': given.streams = atoi(optarg); break;
        case 'r': given.requests = atoi(optarg); break;
        case 'a': given.at_once = atoi(optarg); break;
        case 't': given.timeout = atof(optarg); break;
        case 'k': given.authorization = optarg; break;
        case 'o': given.hold = true; break;
        default: fail("arguments", "see the options in scripts/load_generator.c");
        }
    }
    if (!given.port) fail("--port", "is missing");
    if (given.streams < 1 || given.streams > MOST_STREAMS) fail("--streams", "must be from 1 to 60000");
    if (given.requests < 1 || given.requests > 10000) fail("--requests", "must be from 1 to 10000");
    if (given.at_once < 1) given.at_once = given.streams;
}

int main(int count, char **values) {
    read_arguments(count, values);
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
        if (files.rlim_cur < (rlim_t)given.streams + 16) fail("--streams", "are more than this user may open files");
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    int error = getaddrinfo(given.host, given.port, &hints, &address);
    if (error) fail(given.host, gai_strerror(error));
    make_request();
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (poll_fd < 0) fail("epoll", strerror(errno));
    streams = room(NULL, (size_t)given.streams, sizeof *streams);
    results = room(NULL, (size_t)given.streams * (size_t)given.requests, sizeof *results);
    for (int i = 0; i < given.streams; i++) {
        char *head = room(NULL, HEAD_BYTES, 1), *line = room(NULL, LINE_BYTES, 1);
        streams[i] = (Stream){.fd = -1, .index = i, .left = given.requests, .head = head, .line = line};
    }
    if (!given.hold && given.at_once == given.streams) { /* so that connecting is not measured */
        for (int i = 0; i < given.streams; i++) {
            if (!open_stream(&streams[i])) fail(given.host, "the server takes no connection");
        }
    }
    double start = now();
    run();
    print_results(now() - start);
    if (given.hold) hold();
    return 0;
}
