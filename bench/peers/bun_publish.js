// Bun: its documentation's chat, with the native publish.
const server = Bun.serve({
  hostname: "127.0.0.1",
  port: Number(process.argv[2]),
  fetch(request, server) {
    return server.upgrade(request) ? undefined : new Response("", { status: 400 });
  },
  websocket: {
    open(socket) {
      socket.subscribe("chat");
    },
    message(socket, message) {
      server.publish("chat", message);
    },
    close(socket) {
      socket.unsubscribe("chat");
    },
  },
});
