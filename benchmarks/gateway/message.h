/* Where an HTTP message ends, for messages that say so by their content-length, or have no body. */

#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* Returns the length in bytes of the whole message that `text` begins with, and 0 while it is not all there. */
static size_t whole(const char *text, size_t have) {
    const char *end = memmem(text, have, "\r\n\r\n", 4);
    if (end == NULL) return 0;
    size_t length = (size_t)(end - text) + 4;
    for (const char *line = memchr(text, '\n', have); line < end; line = memchr(line + 1, '\n', have)) {
        if (strncasecmp(line + 1, "content-length:", 15) == 0) {
            length += strtoul(line + 16, NULL, 10);
            break;
        }
    }
    return length <= have ? length : 0;
}
