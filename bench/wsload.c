/* Load for a WebSocket server: connections that read, and some that also send.

     cc -O2 -o wsload wsload.c
     wsload -p PORT -n 1000 -s 8 -w 8 -d 2 -m '{"text": "%s"}' -P PID < cookies

   One thread and epoll: it takes less of a core than any server that it measures, so
   its readers do not hold the server back. It prints one JSON object.

     -n  connections
     -s  how many of them send
     -w  messages that each sender keeps in flight
     -i  instead of -w: seconds between two messages of the same sender. Each sender
         starts at a random moment of the first interval; the moments are the same in
         every run
     -d  seconds           -a  seconds of warming up before
     -m  a message, with %s where its nonce goes
     -P  the server's process, whose CPU time and memory are read
   Standard input: cookies, one per line, for equal shares of the connections.

   Each nonce begins with ~ and ten digits, so that a message is recognized in any frame
   that carries it. A message has arrived when the last connection has it. With -w, a
   sender sends its next message when its own copy of one comes back. With -i, a delay
   counts from the moment when the message was due. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define KEPT (1 << 21) /* messages that may be on their way at a time */
#define NONCE 36       /* as long as a UUID */

#define fail(...) (fprintf(stderr, __VA_ARGS__), fputc(10, stderr), exit(1))

enum state { CONNECTING, HANDSHAKE, OPEN, CLOSED };

struct connection {
  int fd, number, sender, in_flight;
  enum state state;
  uint8_t *rest; /* the beginning of a frame whose end has not come yet */
  size_t rest_size, rest_room;
};

struct message {
  double sent;
  int left; /* connections that do not have it yet */
  struct connection *sender;
};

static int port, readers = 10, senders = 1, window = 1, pid = 0;
static double seconds = 2, warm_up = 0.5, interval = 0;
static const char *template = "%s";
static char **cookies;
static int cookie_count;

static struct connection *connections;
static struct message *messages;
static struct connection **speakers;
static double *starts; /* of those who send, in seconds, sorted */
static int epoll, open_count, closed_count, talking;
static long sent, arrived, deliveries, welcomes;
static double read_at, welcomed; /* when the last byte, the last welcome came */
static double stirred;           /* when something came that is not a message */
static char run[NONCE + 1];      /* tells the nonces of two runs apart */

/* --- The clocks, and the server's memory --- */
static double read_clock(clockid_t clock) { /* seconds */
  struct timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static double now(void) { return read_clock(CLOCK_MONOTONIC); }

static double own_cpu(void) { return read_clock(CLOCK_PROCESS_CPUTIME_ID); }

static double cpu(void) { /* of all threads of the server */
  clockid_t clock;
  if (clock_getcpuclockid(pid, &clock)) fail("-P: there is no process %d", pid);
  return read_clock(clock);
}

static double memory(void) { /* KiB */
  char path[64];
  long pages = 0;
  snprintf(path, sizeof path, "/proc/%d/statm", pid);
  FILE *file = fopen(path, "r");
  if (!file || fscanf(file, "%*s %ld", &pages) != 1) fail("cannot read %s", path);
  fclose(file);
  return pages * (sysconf(_SC_PAGESIZE) / 1024.0);
}

/* --- How long messages took --- */
static double delays[KEPT];
static long delay_count;

static void note_delay(double delay) {
  if (delay_count < KEPT) delays[delay_count++] = delay;
}

static int ascending(const void *a, const void *b) {
  double first = *(const double *)a, second = *(const double *)b;
  return (first > second) - (first < second);
}

static double percentile(double share) { /* milliseconds; the delays are sorted */
  return delay_count ? delays[(long)(share * (delay_count - 1))] * 1e3 : 0;
}

/* --- Sending --- */
static void drop(struct connection *c) {
  if (c->state == CLOSED) return;
  open_count -= c->state == OPEN;
  closed_count++;
  c->state = CLOSED;
  close(c->fd); /* epoll forgets it */
}

static size_t make_frame(uint8_t *out, int opcode, const char *data, size_t size) {
  size_t head = size < 126 ? 2 : 4;
  out[0] = 0x80 | opcode;
  out[1] = 0x80 | (size < 126 ? size : 126);
  if (size >= 126) out[2] = size >> 8, out[3] = size;
  memset(out + head, 0, 4); /* a mask that leaves the data unchanged */
  memcpy(out + head + 4, data, size);
  return head + 4 + size;
}

static void send_whole(struct connection *c, const uint8_t *data, size_t size) {
  while (size && c->state != CLOSED) {
    ssize_t count = send(c->fd, data, size, MSG_NOSIGNAL);
    if (count > 0) {
      data += count, size -= count;
    } else if (errno == EAGAIN) {
      poll(&(struct pollfd){c->fd, POLLOUT, 0}, 1, 1000);
    } else if (errno != EINTR) {
      drop(c);
    }
  }
}

static void send_message(struct connection *c, double when) {
  static char text[1 << 14];
  static uint8_t frame[1 << 15];
  char nonce[2 * NONCE];
  if (sent - arrived >= KEPT) fail("too many messages are on their way");
  snprintf(nonce, sizeof nonce, "~%010ld~%s", sent, run);
  nonce[NONCE] = 0;
  const char *place = strstr(template, "%s");
  int size = snprintf(text, sizeof text, "%.*s%s%s", (int)(place - template), template,
                      nonce, place + 2);
  messages[sent++ % KEPT] = (struct message){when, readers, c};
  c->in_flight++;
  send_whole(c, frame, make_frame(frame, 1, text, size));
}

static void fill(struct connection *c) { /* up to what it may have in flight */
  while (talking && !interval && c->state == OPEN && c->in_flight < window)
    send_message(c, now());
}

/* --- Reading --- */
static int begins(const uint8_t *data, size_t size, const char *type) {
  return memmem(data, size < 24 ? size : 24, type, strlen(type)) != NULL;
}

static void take_text(struct connection *c, const uint8_t *data, size_t size) {
  if (begins(data, size, "\"welcome\"")) welcomes++, welcomed = read_at;
  if (begins(data, size, "\"error\"")) fail("refused: %.*s", (int)size, data);
  if (!begins(data, size, "\"message\"")) { /* a receipt, or a person who came */
    stirred = read_at;
    return;
  }
  const uint8_t *nonce = memchr(data, '~', size);
  if (!nonce || nonce + NONCE > data + size || nonce[11] != '~') return;
  if (memcmp(nonce + 12, run, NONCE - 12)) return; /* of another run */
  long number = atol((const char *)nonce + 1);
  struct message *message = &messages[number % KEPT];
  if (number >= sent || !message->left) fail("a message came twice");
  deliveries++;
  if (message->sender == c) c->in_flight--;
  if (--message->left) return;
  arrived++;
  note_delay(read_at - message->sent);
}

/* Take whole frames; return how many bytes they had. */
static size_t take_frames(struct connection *c, uint8_t *data, size_t size) {
  size_t start = 0;
  while (size - start >= 2 && c->state == OPEN) {
    uint8_t *frame = data + start;
    size_t length = frame[1], head = 2;
    if (length >= 126) {
      head = length == 126 ? 4 : 10;
      if (size - start < head) break;
      length = 0;
      for (size_t i = 2; i < head; i++) length = length << 8 | frame[i];
    }
    if (size - start < head + length) break;
    switch (frame[0]) {
      case 0x81: take_text(c, frame + head, length); break;
      case 0x82: break;
      case 0x88: drop(c); break;
      case 0x89: {
        uint8_t pong[140];
        send_whole(c, pong, make_frame(pong, 10, (char *)frame + head, length));
        break;
      }
      default: fail("not a frame that a server sends: %02x", frame[0]);
    }
    start += head + length;
  }
  return start;
}

static size_t take_answer(struct connection *c, uint8_t *data, size_t size) {
  uint8_t *end = memmem(data, size, "\r\n\r\n", 4);
  if (!end) return 0;
  if (memcmp(data, "HTTP/1.1 101", 12)) fail("refused: %.*s", (int)size, data);
  c->state = OPEN;
  open_count++;
  return end + 4 - data;
}

static void take(struct connection *c) {
  static uint8_t buffer[1 << 19];
  memcpy(buffer, c->rest, c->rest_size);
  uint8_t *place = buffer + c->rest_size;
  ssize_t count = recv(c->fd, place, sizeof buffer - c->rest_size, 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count <= 0) {
    drop(c);
    return;
  }
  size_t size = c->rest_size + count, start = 0;
  read_at = now();
  if (c->state == HANDSHAKE) start = take_answer(c, buffer, size);
  if (c->state == OPEN) start += take_frames(c, buffer + start, size - start);
  if (c->state == CLOSED) return;
  c->rest_size = size - start;
  if (c->rest_size > c->rest_room)
    c->rest = realloc(c->rest, c->rest_room = 2 * c->rest_size);
  memcpy(c->rest, buffer + start, c->rest_size);
  if (c->sender) fill(c);
}

/* --- Connecting --- */
static void begin(struct connection *c) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  int yes = 1;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK); /* and nowhere else */
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  if (connect(c->fd, (void *)&address, sizeof address) && errno != EINPROGRESS)
    fail("connect: %s", strerror(errno));
  struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
}

static void shake_hands(struct connection *c) {
  char request[8192];
  int size = snprintf(request, sizeof request,
                      "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                      "Origin: http://127.0.0.1:%d\r\n"
                      "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                      "Sec-WebSocket-Version: 13\r\n"
                      "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n%s\r\n",
                      port, port, cookie_count ? cookies[(long)c->number * cookie_count / readers] : "");
  if (send(c->fd, request, size, MSG_NOSIGNAL) != size) fail("the server closed");
  c->state = HANDSHAKE;
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
  epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

static void wait_for_events(int milliseconds) {
  static struct epoll_event events[4096];
  int count = epoll_wait(epoll, events, 4096, milliseconds);
  for (int i = 0; i < count; i++) {
    struct connection *c = events[i].data.ptr;
    if (c->state == CONNECTING) shake_hands(c);
    else if (c->state != CLOSED) take(c);
  }
}

static void connect_all(void) { /* fewer at a time than any server's backlog */
  int started = 0;
  double limit = now() + 120;
  while (open_count < readers) {
    while (started < readers && started - open_count < 32) begin(&connections[started++]);
    wait_for_events(10);
    if (closed_count) fail("the server closed a connection");
    if (now() > limit) fail("only %d of %d are connected", open_count, readers);
  }
}

static void settle(double quiet) { /* until nothing but messages has come for a while */
  double limit = now() + 20;
  stirred = now();
  while (now() < limit && now() - stirred < quiet) wait_for_events(10);
}

/* --- Talking --- */
static double due(long turn) { /* seconds after the start */
  return starts[turn % senders] + interval * (turn / senders);
}

static void talk(double duration) {
  double start = now(), end = start + duration, next = end;
  long turn = 0;
  talking = 1;
  for (int i = 0; i < senders; i++) fill(speakers[i]);
  while (now() < end && open_count) {
    if (interval && senders) {
      for (; (next = start + due(turn)) <= now(); turn++)
        send_message(speakers[turn % senders], next);
    }
    double wait = (next < end ? next : end) - now();
    wait_for_events(interval && wait > 0 ? wait * 1e3 : 0); /* spin in the last one */
  }
  talking = 0;
  end = now() + 10 + duration;
  while (arrived < sent && now() < end && now() - read_at < 10) wait_for_events(1);
}

static void read_options(int count, char **words) {
  for (int option; (option = getopt(count, words, "p:n:s:w:i:d:a:m:P:")) != -1;)
    switch (option) {
      case 'p': port = atoi(optarg); break;
      case 'n': readers = atoi(optarg); break;
      case 's': senders = atoi(optarg); break;
      case 'w': window = atoi(optarg); break;
      case 'i': interval = atof(optarg); break;
      case 'd': seconds = atof(optarg); break;
      case 'a': warm_up = atof(optarg); break;
      case 'm': template = optarg; break;
      case 'P': pid = atoi(optarg); break;
      default: fail("see the head of wsload.c");
    }
  if (!strstr(template, "%s")) fail("-m: there is no %%s in the message");
  if (senders > readers) senders = readers;
  char *line = NULL;
  size_t room = 0;
  for (ssize_t size; (size = getline(&line, &room, stdin)) > 1;) {
    line[size - 1] = 0;
    cookies = realloc(cookies, (cookie_count + 1) * sizeof *cookies);
    cookies[cookie_count] = malloc(size + 16);
    sprintf(cookies[cookie_count++], "Cookie: %s\r\n", line);
  }
}

static void prepare(void) {
  alarm(300); /* whatever happens, end */
  snprintf(run, sizeof run, "%024.0f", now() * 1e9);
  epoll = epoll_create1(0);
  messages = calloc(KEPT, sizeof *messages);
  connections = calloc(readers, sizeof *connections);
  speakers = calloc(senders + 1, sizeof *speakers);
  starts = calloc(senders + 1, sizeof *starts);
  for (int i = 0; i < readers; i++) connections[i].number = i;
  srand48(1);
  for (int i = 0; i < senders; i++) { /* in the middle of each share of the room */
    speakers[i] = &connections[(2L * i + 1) * readers / (2 * senders)];
    speakers[i]->sender = 1;
    starts[i] = drand48() * interval;
  }
  qsort(starts, senders, sizeof *starts, ascending);
}

int main(int count, char **words) {
  read_options(count, words);
  prepare();
  double size = memory(), used = cpu(), start = now();
  connect_all();
  settle(0.3);
  double connecting = cpu() - used, connection = (memory() - size) / open_count;
  double welcoming = welcomes ? welcomed - start : 0;
  if (warm_up) talk(warm_up);
  delay_count = 0;
  long sent_before = sent, deliveries_before = deliveries;
  double own = own_cpu();
  used = cpu(), start = now();
  talk(seconds);
  double took = now() - start;
  used = cpu() - used, own = own_cpu() - own;
  long told = deliveries - deliveries_before, said = sent - sent_before;
  long missing = said * readers - told;
  for (long i = sent - said; missing && i < sent; i++) /* these took so long, at least */
    if (messages[i % KEPT].left) note_delay(now() - messages[i % KEPT].sent);
  qsort(delays, delay_count, sizeof *delays, ascending);
  printf("{\"connecting_cpu\": %f, \"welcoming\": %f, \"welcomes\": %ld, \"kib\": %f, "
         "\"messages\": %ld, \"deliveries\": %ld, \"missing\": %ld, \"seconds\": %f, "
         "\"cpu\": %f, \"p50\": %f, \"p99\": %f, \"longest\": %f, \"load\": %f}\n",
         connecting, welcoming, welcomes, connection, said, told, missing, took, used,
         percentile(0.5), percentile(0.99), percentile(1), own / took);
  return 0; /* the sockets close with the process */
}
