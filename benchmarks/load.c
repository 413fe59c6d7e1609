/* The two ends of the benchmarks that must cost almost nothing, so they are in C.
 *
 *   load read PORT COUNT EVERY   COUNT WebSocket clients on one thread. Reads COUNT tokens from stdin,
 *                                a line each; prints "ready" once every client has heard its first
 *                                text frame, then the number of further text frames at every EVERYth.
 *                                Answers pings. Ends when stdin does.
 *   load send COUNT              The floor: an epoll loop that answers COUNT upgrade requests without
 *                                a look at them. Prints its port. For each line "SWEEPS" on stdin it
 *                                sends so many pokes to every client, one send() each, and prints the
 *                                CPU seconds that took.
 *
 * They speak to each other and to the real servers alike.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { AT_ONCE = 100, EVENTS = 1024, TOKEN_BYTES = 1024, NAP_US = 1000 };

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int epoll;

static void watch(int fd, uint32_t events, void *item) {
    struct epoll_event event = {.events = events, .data.ptr = item};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

/* --- read ------------------------------------------------------------------------------------ */

struct client {
    int fd;
    int matched;      /* of the four bytes that end the response's head; 4: frames follow */
    int ready;
    int header_bytes; /* of the frame header that is being read */
    uint8_t header[4];
    uint32_t size, left; /* of the frame's payload, and what is still to come of it */
    uint8_t ping[125];
};

static long ready, pokes, every;

static void on_frame(struct client *client) {
    int opcode = client->header[0] & 15;
    if (opcode == 9) {
        uint8_t pong[131] = {0x8a, 0x80 | client->size}; /* the mask is zero */
        memcpy(pong + 6, client->ping, client->size);
        if (send(client->fd, pong, 6 + client->size, 0) < 0) fail("pong");
    } else if (opcode != 1) {
        fprintf(stderr, "load: a frame with opcode %d\n", opcode);
        exit(1);
    } else if (!client->ready) {
        client->ready = 1;
        ready++;
    } else if (++pokes % every == 0) {
        printf("%ld\n", pokes);
    }
}

/* Whether the header is complete; a server's is two bytes, or four for a longer payload. */
static int in_header(struct client *client, uint8_t byte) {
    client->header[client->header_bytes++] = byte;
    uint8_t *header = client->header;
    if (client->header_bytes < 2 || (header[1] == 126 && client->header_bytes < 4)) return 0;
    client->size = client->left = header[1] < 126 ? header[1] : header[2] << 8 | header[3];
    client->header_bytes = 0;
    return 1;
}

static void take(struct client *client, const uint8_t *data, size_t size) {
    for (size_t at = 0; at < size;) {
        if (client->matched < 4) {
            uint8_t byte = data[at++];
            client->matched = byte == "\r\n\r\n"[client->matched] ? client->matched + 1 : byte == '\r';
            continue;
        }
        if (client->left) {
            uint32_t step = size - at < client->left ? size - at : client->left;
            if ((client->header[0] & 15) == 9)
                memcpy(client->ping + client->size - client->left, data + at, step);
            at += step;
            client->left -= step;
        } else if (!in_header(client, data[at++])) {
            continue;
        }
        if (!client->left) on_frame(client);
    }
}

static void drain(struct client *client) {
    uint8_t data[16384];
    ssize_t size = recv(client->fd, data, sizeof data, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) {
        fprintf(stderr, "load: the server hung up\n");
        exit(1);
    }
    if (!client->matched && size > 12 && memcmp(data, "HTTP/1.1 101", 12)) {
        fprintf(stderr, "load: refused: %.*s\n", (int)size, data);
        exit(1);
    }
    take(client, data, size);
}

/* Each process has a loopback address of its own, since one address has 28,000 ports for a server. */
static void bind_to_own_address(int fd) {
    struct sockaddr_in own = loopback(0);
    own.sin_addr.s_addr = htonl(INADDR_LOOPBACK + getpid());
    int late = 1; /* connect() chooses the port */
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &late, sizeof late);
    if (bind(fd, (const void *)&own, sizeof own) < 0) fail("bind");
}

static void dial(struct client *client, const struct sockaddr_in *address) {
    char token[TOKEN_BYTES], request[TOKEN_BYTES + 512];
    if (!fgets(token, sizeof token, stdin)) fail("a token on stdin");
    token[strcspn(token, "\n")] = 0;
    int size = snprintf(request, sizeof request,
        "GET /v1/connect HTTP/1.1\r\nHost: localhost:%d\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\nAuthorization: Bearer %s\r\n\r\n",
        ntohs(address->sin_port), token);
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->fd < 0) fail("socket");
    bind_to_own_address(client->fd);
    if (connect(client->fd, (const void *)address, sizeof *address) < 0) fail("connect");
    struct linger reset = {1, 0}; /* the end of a run leaves no port in TIME_WAIT */
    setsockopt(client->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    if (send(client->fd, request, size, 0) != size) fail("send");
    watch(client->fd, EPOLLIN, client);
}

static int read_pokes(int port, long count) {
    struct client *clients = calloc(count, sizeof *clients), input = {0};
    struct sockaddr_in address = loopback(port);
    struct epoll_event events[EVENTS];
    for (long dialled = 0, told = 0;;) {
        while (dialled < count && dialled < ready + AT_ONCE) dial(&clients[dialled++], &address);
        if (!told && ready == count) {
            told = 1;
            puts("ready");
            watch(STDIN_FILENO, EPOLLIN, &input);
        }
        int found = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < found; i++) {
            if (events[i].data.ptr == &input) return 0;
            struct client *client = events[i].data.ptr;
            drain(client);
        }
        /* A client each would sleep on machines of their own. Here a wake-up for every poke would be
         * the sender's cost, and would vary with its speed: so take what comes once a millisecond. */
        if (told) usleep(NAP_US);
    }
}

/* --- send ------------------------------------------------------------------------------------ */

static const char ANSWER[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    "\x81\x10{\"type\":\"ready\"}";

static double cpu_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void sweep(const int *clients, long count, long version) {
    char frame[64];
    int size = 2 + sprintf(frame + 2, "{\"type\":\"poke\",\"version\":%ld}", version);
    frame[0] = '\x81';
    frame[1] = size - 2;
    for (long i = 0; i < count; i++)
        if (send(clients[i], frame, size, 0) != size) fail("send");
    struct epoll_event events[EVENTS];
    if (epoll_wait(epoll, events, EVENTS, 0) > 0) fail("a client spoke");
}

static int send_pokes(long count) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), *clients = calloc(count, sizeof *clients);
    struct sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    if (bind(listener, (void *)&address, size) < 0 || listen(listener, 4096) < 0) fail("listen");
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    for (long i = 0; i < count; i++) {
        char request[4096];
        clients[i] = accept4(listener, NULL, NULL, 0);
        if (clients[i] < 0 || recv(clients[i], request, sizeof request, 0) <= 0) fail("accept");
        if (send(clients[i], ANSWER, sizeof ANSWER - 1, 0) < 0) fail("send");
        int on = 1;
        setsockopt(clients[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(clients[i], EPOLLIN, &clients[i]);
    }
    long version = 1000000;
    for (long sweeps; scanf("%ld", &sweeps) == 1;) {
        double started_s = cpu_s();
        for (long i = 0; i < sweeps; i++) sweep(clients, count, version++);
        printf("%.6f\n", cpu_s() - started_s);
    }
    return 0;
}

int main(int argc, char **argv) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    setvbuf(stdout, NULL, _IOLBF, 0);
    epoll = epoll_create1(0);
    if (argc == 5 && !strcmp(argv[1], "read")) {
        every = atol(argv[4]);
        return read_pokes(atoi(argv[2]), atol(argv[3]));
    }
    if (argc == 3 && !strcmp(argv[1], "send")) return send_pokes(atol(argv[2]));
    fprintf(stderr, "usage: load read PORT COUNT EVERY | load send COUNT\n");
    return 2;
}
