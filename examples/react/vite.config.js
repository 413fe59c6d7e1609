import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [react()],
  // The client is linked from the checkout, where it has a React of its own for its tests.
  resolve: { dedupe: ["react", "react-dom"] },
  server: { host: "127.0.0.1" },
});
