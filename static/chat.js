// The page of the chat, without a library. It promises two things: what it shows is true,
// and what you type is sent once and in order. This file has what you do and what the
// server tells, in the order of a message's life. connection.js delivers, log.js shows.

import { Connection, Outbox, keep, recall } from "./connection.js";
import * as log from "./log.js";

const { find, room } = log;
const { user } = room.dataset;
const box = find("text");
const maxLength = Number(box.dataset.maxLength);
const seconds = (name) => Number(room.dataset[name]); // tests shorten the intervals
const tabs = new BroadcastChannel("chat"); // the other tabs of this browser

const outbox = new Outbox(user);
const connection = new Connection(seconds, { lastId: () => lastId, handle, lost, explain, signIn });

let lastId = Number(find("messages").lastElementChild?.dataset.id ?? 0);
let inFlight = null; // the nonce that waits for its receipt, one at a time
let retry = 0; // the timer that sends it again
let disagreements = 0; // in a row, about which message is the newest
let stale = false; // whether only a reload can make the page whole
let leaving = false;
let leaveTimer = 0;

// --- You write: into the box, the outbox and the log, in grey ---
function submit() {
  const text = box.value;
  const length = [...text].length; // characters, as the server counts them
  box.focus();
  if (!text.trim()) return;
  if (length > maxLength) {
    tell("problem", `A message has at most ${maxLength} characters; this one has ${length}.`);
    return;
  }
  box.value = "";
  tell("problem", "");
  log.showPending(outbox.add(text));
  sendNext();
}

// Send one at a time: a message that has to be repeated must not be overtaken.
function sendNext() {
  const [message] = outbox.pending;
  if (!connection.live || inFlight || !message) return;
  inFlight = message.nonce;
  connection.send({ type: "message", ...message });
}

function sendAgain() {
  inFlight = null;
  sendNext();
}

// --- The server tells ---
function handle(event) {
  switch (event.type) {
    case "welcome": return handleWelcome(event);
    case "receipt": return handleReceipt(event);
    case "message": return handleMessage(event);
    case "error": return handleError(event);
    case "joined": return handlePerson(event, log.enter);
    case "left": return handlePerson(event, log.leave);
    case "heartbeat": return compare(event.last);
    default: throw new Error(`unknown event ${event.type}`);
  }
}

function handleWelcome(event) {
  log.flush();
  if (event.user !== user) return becomeOther(event.user);
  clearTimeout(leaveTimer); // you have signed in again
  leaveTimer = 0;
  log.showOnline(event.online);
  showStatus("online");
  explain("");
  compare(event.last);
  return sendNext();
}

// Before `welcome` only collect: all that was missed is shown in one layout.
function show(event) {
  log.show(event);
  if (connection.live) log.flushSoon();
}

function handlePerson(event, move) {
  move(event.user);
  show(event);
}

// The message is stored, so the next one may go. Its item waits for the broadcast. If the
// broadcast came before, as after a lost receipt, the item goes at once.
function handleReceipt({ nonce, id }) {
  outbox.remove(nonce);
  if (id <= lastId) log.forget(nonce);
  if (nonce !== inFlight) return;
  explain("");
  sendAgain();
}

function handleMessage(event) {
  if (event.id <= lastId) { // repeated by a process that is behind, or changed
    if (!log.update(event)) leaveSoon();
    return;
  }
  if (event.id > lastId + 1) leaveSoon(); // more was missed than the server replays
  lastId = event.id;
  if (event.user === user && outbox.remove(event.nonce)) explain("");
  show(event);
}

// An error without a nonce is about the message in flight: the page sent nothing else.
// `problem` is about the text in the box and stays until you type. `reason` is about
// delivery: it goes when delivery works again.
function handleError({ code, text, nonce = inFlight }) {
  tell(code === "not_saved" ? "reason" : "problem", text);
  if (!nonce || nonce !== inFlight) return;
  if (code === "not_saved") retry = setTimeout(sendAgain, 1000 + 1000 * Math.random());
  else refuse(nonce);
}

// Don't repeat what the server refuses: it would block the messages behind it. Give it
// back to the user.
function refuse(nonce) {
  const message = outbox.remove(nonce);
  log.forget(nonce);
  const caret = box.selectionEnd ? "preserve" : "end"; // "end": of the text that comes back
  if (message) box.setRangeText(message.text + (box.value && "\n"), 0, 0, caret);
  outbox.keep(box.value);
  sendAgain();
}

// Act on the third disagreement in a row: a process may be behind for a while.
function compare(last) {
  disagreements = last === lastId ? 0 : disagreements + 1;
  if (stale || disagreements > 2) leaveSoon();
}

// --- The connection is lost, and the page says so ---
function lost(code, wasLive) {
  const nonce = inFlight;
  inFlight = null;
  clearTimeout(retry);
  if (code === 1009 && nonce) { // a frame too big
    tell("problem", "The message is too long.");
    refuse(nonce);
  }
  log.flush();
  log.showOnline([]);
  showStatus(wasLive ? "connecting" : "offline");
}

function showStatus(text) {
  tell("status", text);
  find("status").dataset.status = text;
}

function explain(sentence) {
  tell("reason", sentence);
}

function tell(id, text) { // a screen reader speaks every change, so avoid empty ones
  if (find(id).textContent !== text) find(id).textContent = text;
}

// --- Who you are: the tabs of a browser share one session ---
function signIn(go = leaveSoon) {
  stop("Your session has ended. Reload the page to sign in at once.");
  go("/login?why=ended");
}

// Don't send what one user typed under the name of another: it waits in its own outbox.
function becomeOther(name) {
  stop(`This browser is now signed in as ${name}. Reload the page to go on.`);
  leaveSoon("/");
}

function stop(sentence) {
  connection.drop();
  lost();
  explain(sentence);
}

async function signOut(event) {
  event.preventDefault();
  const signal = AbortSignal.timeout(1000 * seconds("answer"));
  const options = { method: "POST", redirect: "manual", signal };
  const answer = await fetch(event.target.action, options).catch(() => null);
  if (answer?.type !== "opaqueredirect") {
    return explain("Signing out did not work. You are still signed in.");
  }
  tabs.postMessage(""); // not earlier: the sign-in page sends users with a session back
  stop("You have signed out. Reload the page to sign in.");
  return leave("/login");
}

// --- Leaving: at most once a minute by itself, whatever the server says ---
function leaveSoon(address) {
  stale ||= !address;
  if (leaving || (leaveTimer && !address)) return;
  clearTimeout(leaveTimer);
  const pause = 1000 * seconds("reload");
  // Without storage the page cannot remember, so it waits until it is a minute old.
  const last = keep("left", recall("left") ?? 0) ? recall("left") : performance.timeOrigin;
  const wait = Math.min(pause, Math.max(0, last + pause - Date.now()));
  leaveTimer = setTimeout(() => {
    leaveTimer = 0;
    if (!address && !connection.live) return; // to reload needs a server: the next welcome
    if (wouldLose()) return;
    keep("left", Date.now());
    leave(address);
  }, wait);
}

// The storage goes with the tab; without storage, what is unsent goes with the page.
const wouldLose = () => !outbox.kept && (outbox.pending.length || box.value);

// Stay connected until the next page comes: you may stop the loading, or it may fail.
function leave(address) {
  leaving = true;
  if (address) location.assign(address);
  else location.reload();
  setTimeout(() => { leaving = false; }, 1000 * seconds("answer"));
}

// --- Wiring ---
find("send").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
box.addEventListener("keydown", (event) => {
  // Safari ends a composition before its Enter arrives; keyCode 229 gives that one away.
  const composing = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || composing) return;
  event.preventDefault();
  submit();
});
box.addEventListener("input", () => {
  tell("problem", "");
  outbox.keep(box.value);
});
find("signout").addEventListener("submit", signOut);
tabs.addEventListener("message", ({ data: name }) => {
  if (!name) signIn(leave);
  else if (name !== user) becomeOther(name);
  else if (!connection.socket) connection.connect(); // you have signed in again
});
window.addEventListener("online", () => connection.wake());
document.addEventListener("visibilitychange", () => document.hidden || connection.wake());
window.addEventListener("pageshow", (event) => {
  if (event.persisted) leave(); // from the back-forward cache: signed out?
});
window.addEventListener("beforeunload", (event) => {
  if (wouldLose() || (outbox.pending.length && !leaving)) event.preventDefault();
});

for (const item of document.querySelectorAll("#messages .own")) outbox.remove(item.dataset.nonce);
log.start();
outbox.pending.forEach(log.showPending);
box.value = outbox.draft || box.value;
find("send").inert = false;
if (window.self === window.top) box.focus(); // in a frame: the notebook keeps its keyboard
tabs.postMessage(user);
connection.connect();
