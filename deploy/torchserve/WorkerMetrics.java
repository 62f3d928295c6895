package serving;

import java.io.IOException;
import java.io.InputStream;
import java.net.HttpURLConnection;
import java.net.Proxy;
import java.net.URL;
import java.nio.charset.StandardCharsets;
import org.pytorch.serve.servingsdk.Context;
import org.pytorch.serve.servingsdk.ModelServerEndpoint;
import org.pytorch.serve.servingsdk.annotations.Endpoint;
import org.pytorch.serve.servingsdk.annotations.helpers.EndpointTypes;
import org.pytorch.serve.servingsdk.http.Request;
import org.pytorch.serve.servingsdk.http.Response;

/**
 * Answers GET /metrics on the port of predictions with what the worker serves on loopback
 * (handler/metrics.py). TorchServe finds this class through META-INF/services.
 */
@Endpoint(
        urlPattern = "metrics",
        endpointType = EndpointTypes.INFERENCE,
        description = "Metrics of the worker")
public final class WorkerMetrics extends ModelServerEndpoint {
    private static final String PORT = System.getenv("SERVING_METRICS_PORT");
    private static final int LIMIT_MILLISECONDS = 1000;

    /** All can send requests here, and the worker spends milliseconds on each. */
    private static final long KEPT_NANOSECONDS = 1_000_000_000L;

    private byte[] text = new byte[0];
    private boolean served;
    private long askedAt = System.nanoTime() - KEPT_NANOSECONDS;

    @Override
    public void doGet(Request request, Response response, Context context) throws IOException {
        ask();
        response.setStatus(served ? 200 : 503);
        response.setContentType("text/plain; version=0.0.4; charset=utf-8");
        response.getOutputStream().write(text);
    }

    @Override
    public void doPost(Request request, Response response, Context context) {
        response.setStatus(405);
    }

    @Override
    public void doPut(Request request, Response response, Context context) {
        response.setStatus(405);
    }

    @Override
    public void doDelete(Request request, Response response, Context context) {
        response.setStatus(405);
    }

    private synchronized void ask() {
        if (System.nanoTime() - askedAt < KEPT_NANOSECONDS) {
            return;
        }
        try {
            URL url = new URL("http://127.0.0.1:" + PORT + "/metrics");
            HttpURLConnection worker = (HttpURLConnection) url.openConnection(Proxy.NO_PROXY);
            worker.setConnectTimeout(LIMIT_MILLISECONDS);
            worker.setReadTimeout(LIMIT_MILLISECONDS);
            try (InputStream stream = worker.getInputStream()) {
                text = stream.readAllBytes();
                served = true;
            }
        } catch (IOException error) {
            text = "no worker serves metrics\n".getBytes(StandardCharsets.UTF_8);
            served = false;
        }
        askedAt = System.nanoTime();
    }
}
