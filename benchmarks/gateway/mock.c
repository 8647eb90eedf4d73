/* The provider of these benchmarks: one thread that answers chat completions, as quickly as a kernel lets it.

   A request says by its body what it wants, for that is what every proxy passes on:

     "model":"…-slow"         the answer is to come after 50 ms
     "stream":true            an answer in 31 events, one write each, back to back
     "model":"…-paced"        the same, an event each 10 ms
     "include_usage":true     a stream's last write brings the usage too

   It prints its port, and serves until it is killed. A request longer than a caller's buffer, or an answer that
   does not fit into the socket's, ends the connection, which whoever calls counts as an error. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "message.h"

#define EVENTS 31
#define BATCH 256

typedef struct Caller {
    int fd;
    int sent;            /* events of the stream that is under way */
    int usage;           /* whether it asked for the usage */
    int waiting;         /* whether it stands in a queue */
    size_t have;
    uint64_t due_us;
    struct Caller *next;
    char in[16384];
} Caller;

/* Who waits: everybody in a queue waits equally long, so that whoever came first is due first. */
typedef struct {
    uint64_t delay_us;
    Caller *first, *last;
} Queue;

static Queue slow = {50000, NULL, NULL}, paced = {10000, NULL, NULL};
static char answer[2048], events[EVENTS][1024], end_with_usage[2048];
static size_t answer_bytes, event_bytes[EVENTS], end_with_usage_bytes;

static const char FIELDS[] =
    "x-request-id: req_5f1c2f4f9f7f4f6ab1f6d7a1c0de0001\r\n"
    "openai-organization: org-bench\r\n"
    "openai-processing-ms: 12\r\n"
    "openai-version: 2020-10-01\r\n"
    "x-ratelimit-limit-requests: 10000\r\n"
    "x-ratelimit-limit-tokens: 2000000\r\n"
    "x-ratelimit-remaining-requests: 9999\r\n"
    "x-ratelimit-remaining-tokens: 1999750\r\n";
static const char USAGE[] =
    "\"usage\":{\"prompt_tokens\":140,\"completion_tokens\":100,\"total_tokens\":240}";
static const char CHUNK[] =
    "data: {\"id\":\"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT\",\"object\":\"chat.completion.chunk\","
    "\"created\":1764100000,\"model\":\"gpt-4o-mini\",\"system_fingerprint\":\"fp_44709d6fcb\",\"choices\":";

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static size_t chunk(char *to, const char *text) {
    return (size_t)sprintf(to, "%zx\r\n%s\r\n", strlen(text), text);
}

static void write_answers(void) {
    char text[1024], words[512] = "";
    while (strlen(words) < 504) strcat(words, "Twelve words. ");
    sprintf(text,
            "{\"id\":\"chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT\",\"object\":\"chat.completion\","
            "\"created\":1764100000,\"model\":\"gpt-4o-mini\",\"choices\":[{\"index\":0,"
            "\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},"
            "\"logprobs\":null,\"finish_reason\":\"stop\"}],%s}",
            words, USAGE);
    answer_bytes = (size_t)sprintf(answer,
                                   "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                                   "content-length: %zu\r\n%s\r\n%s",
                                   strlen(text), FIELDS, text);
    size_t head = (size_t)sprintf(events[0], "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                             "transfer-encoding: chunked\r\n%s\r\n", FIELDS);
    for (int i = 0; i < EVENTS - 1; i++) {
        const char *delta = i == 0            ? "{\"role\":\"assistant\",\"content\":\"\"}"
                            : i < EVENTS - 2 ? "{\"content\":\" word\"}"
                                             : "{}";
        sprintf(text, "%s[{\"index\":0,\"delta\":%s,\"logprobs\":null,\"finish_reason\":%s}]}\n\n", CHUNK, delta,
                i < EVENTS - 2 ? "null" : "\"stop\"");
        event_bytes[i] = chunk(events[i] + (i ? 0 : head), text) + (i ? 0 : head);
    }
    char *end = events[EVENTS - 1];
    event_bytes[EVENTS - 1] = chunk(end, "data: [DONE]\n\n") + (size_t)sprintf(end + strlen(end), "0\r\n\r\n");
    sprintf(text, "%s[],%s}\n\n", CHUNK, USAGE);
    end_with_usage_bytes = chunk(end_with_usage, text);
    end_with_usage_bytes += (size_t)sprintf(end_with_usage + end_with_usage_bytes, "%s", end);
}

static void wait_in(Queue *queue, Caller *caller, uint64_t since_us) {
    caller->due_us = since_us + queue->delay_us;
    caller->waiting = 1;
    caller->next = NULL;
    if (queue->first == NULL) queue->first = caller;
    else queue->last->next = caller;
    queue->last = caller;
}

/* A caller who stands in a queue is forgotten once it is its turn. */
static void leave(Caller *caller) {
    if (caller->fd >= 0) close(caller->fd);
    caller->fd = -1;
    if (!caller->waiting) free(caller);
}

static int tell(Caller *caller, const char *bytes, size_t length) {
    return send(caller->fd, bytes, length, MSG_NOSIGNAL) == (ssize_t)length;
}

static int tell_event(Caller *caller) {
    int number = caller->sent++;
    if (number < EVENTS - 1 || !caller->usage) return tell(caller, events[number], event_bytes[number]);
    return tell(caller, end_with_usage, end_with_usage_bytes);
}

/* Returns whether the caller is still there. */
static int serve(Caller *caller, size_t length) {
    char *body = memmem(caller->in, length, "\r\n\r\n", 4), *end = caller->in + length;
    char *model = memmem(body, (size_t)(end - body), "\"model\":\"", 9);
    char *quote = model == NULL ? NULL : memchr(model + 9, '"', (size_t)(end - model - 9));
    int is_slow = quote != NULL && memcmp(quote - 5, "-slow", 5) == 0;
    int is_paced = quote != NULL && memcmp(quote - 6, "-paced", 6) == 0;
    if (memmem(body, (size_t)(end - body), "\"stream\":true", 13) == NULL) {
        if (!is_slow) return tell(caller, answer, answer_bytes);
        wait_in(&slow, caller, now_us());
        return 1;
    }
    caller->sent = 0;
    caller->usage = memmem(body, (size_t)(end - body), "\"include_usage\":true", 20) != NULL;
    if (is_paced) {
        wait_in(&paced, caller, now_us());
        return 1;
    }
    while (caller->sent < EVENTS)
        if (!tell_event(caller)) return 0;
    return 1;
}

static void hear(Caller *caller) {
    ssize_t got = recv(caller->fd, caller->in + caller->have, sizeof caller->in - caller->have, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        leave(caller);
        return;
    }
    caller->have += (size_t)got;
    size_t length = whole(caller->in, caller->have);
    if (length == 0) return;
    caller->have = 0; /* nobody sends a second request before the first has its answer */
    if (!serve(caller, length)) leave(caller);
}

/* Does what is due in a queue. */
static void turn(Queue *queue, uint64_t now) {
    while (queue->first != NULL && queue->first->due_us <= now) {
        Caller *caller = queue->first;
        queue->first = caller->next;
        caller->waiting = 0;
        int there = caller->fd >= 0 && (queue == &slow ? tell(caller, answer, answer_bytes) : tell_event(caller));
        if (!there) leave(caller);
        else if (queue == &paced && caller->sent < EVENTS) wait_in(&paced, caller, caller->due_us);
    }
}

/* Returns for how many ms nothing is due, rounded up; -1 if nobody waits. */
static int idle_ms(void) {
    uint64_t due = UINT64_MAX, now = now_us();
    if (slow.first != NULL) due = slow.first->due_us;
    if (paced.first != NULL && paced.first->due_us < due) due = paced.first->due_us;
    if (due == UINT64_MAX) return -1;
    return due <= now ? 0 : (int)((due - now + 999) / 1000);
}

int main(void) {
    write_answers();
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listening = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
    if (bind(listening, (struct sockaddr *)&address, size) || listen(listening, 4096)) return 1;
    getsockname(listening, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event told[BATCH], wanted = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poll, EPOLL_CTL_ADD, listening, &wanted);
    for (;;) {
        int count = epoll_wait(poll, told, BATCH, idle_ms());
        for (int i = 0; i < count; i++) {
            if (told[i].data.ptr != NULL) {
                hear(told[i].data.ptr);
                continue;
            }
            Caller *caller = calloc(1, sizeof *caller);
            caller->fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK);
            int one = 1;
            setsockopt(caller->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            wanted.data.ptr = caller;
            epoll_ctl(poll, EPOLL_CTL_ADD, caller->fd, &wanted);
        }
        uint64_t now = now_us();
        turn(&slow, now);
        turn(&paced, now);
    }
}
