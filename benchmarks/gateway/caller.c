/* Whoever calls where there is no wrk: some connections, one request at a time on each, until CALLS are answered.

   Usage: caller PORT CONNECTIONS CALLS SIZE <requests

   Standard input has requests of SIZE bytes each, which take turns. It exits with 1 at the first answer that is no
   200, and knows only answers that have a content-length. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "message.h"

#define MOST 256

typedef struct {
    int fd;
    size_t have;
    char in[16384];
} Line;

static Line lines[MOST];
static char requests[32 << 20];

static int failed(const char *what) {
    fprintf(stderr, "caller: %s\n", what);
    return 1;
}

int main(int count, char **given) {
    if (count != 5) return failed("caller PORT CONNECTIONS CALLS SIZE <requests");
    int connections = atoi(given[2]), calls = atoi(given[3]), asked = 0, answered = 0, poll = epoll_create1(0);
    size_t size = strtoul(given[4], NULL, 10), kinds = fread(requests, 1, sizeof requests, stdin) / size;
    if (connections > MOST || kinds == 0) return failed("too many connections, or no request");
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(given[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < connections; i++) {
        int one = 1;
        lines[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(lines[i].fd, (struct sockaddr *)&address, sizeof address)) return failed("nobody listens");
        setsockopt(lines[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = &lines[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, lines[i].fd, &wanted);
        if (send(lines[i].fd, requests + (size_t)asked++ % kinds * size, size, 0) < 0) return failed("it hung up");
    }
    while (answered < calls) {
        struct epoll_event told[MOST];
        int ready = epoll_wait(poll, told, MOST, 10000);
        if (ready <= 0) return failed("no answer within 10 s");
        for (int i = 0; i < ready; i++) {
            Line *line = told[i].data.ptr;
            ssize_t got = recv(line->fd, line->in + line->have, sizeof line->in - line->have, 0);
            if (got <= 0) return failed("it hung up");
            line->have += (size_t)got;
            if (whole(line->in, line->have) == 0) continue;
            if (strncmp(line->in, "HTTP/1.1 200", 12)) return failed("an answer is not a 200");
            line->have = 0;
            answered++;
            if (asked < calls && send(line->fd, requests + (size_t)asked++ % kinds * size, size, 0) < 0)
                return failed("it hung up");
        }
    }
    return 0;
}
